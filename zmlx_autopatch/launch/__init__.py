"""`zmlx run`: start the user's own command, with the start-up hook on its path."""
