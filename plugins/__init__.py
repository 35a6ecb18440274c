"""The built-in plugins: each module is one plugin, and its file name is the name that a recipe uses."""
