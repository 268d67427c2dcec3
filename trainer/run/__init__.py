"""One run: its folder, and the parts it starts, watches and takes down."""
