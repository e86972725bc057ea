"""The parts of nanoCaption: each is readable on its own and imports nothing from above."""
