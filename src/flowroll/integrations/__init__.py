"""Plug-ins for trainers, one module each; a trainer is imported when its plug-in is."""
