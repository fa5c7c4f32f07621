"""Other projects' machinery, each in a module that imports it only when called."""
