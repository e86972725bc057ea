"""The parts of nanoCaption: each can be read on its own, and none imports the top-level scripts."""
