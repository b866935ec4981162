"""The weights of an engine: reading or receiving new ones beside the old, exchanging, offloading, versions, checksums."""
