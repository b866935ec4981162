"""Programs that show flowroll at work."""
