"""What memhook costs and how well it works, as functions that return rows; the command `memhook bench` prints them."""
