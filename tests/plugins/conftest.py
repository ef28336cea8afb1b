"""The distributions here are built and installed, not collected."""

collect_ignore_glob = ["good/*", "broken/*"]
