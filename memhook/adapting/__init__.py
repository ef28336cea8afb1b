"""What adapters that hook modules need."""
