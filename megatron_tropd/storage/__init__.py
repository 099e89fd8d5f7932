"""Files and directories that this program writes: whole or not at all, and never over what is somebody else's."""
