"""New weights: read or received beside the old ones, exchanged, offloaded; their versions and checksums."""
