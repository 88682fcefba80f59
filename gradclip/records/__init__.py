"""Records: what happened, kept on the device and read on the host when a log entry is due."""
