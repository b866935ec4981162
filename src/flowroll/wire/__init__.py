"""What flowroll says over HTTP and on disk: requests in, rollouts out.

Owns every wire name. `schema` (pydantic) is what a server reads; `codec` and `files` are what a trainer needs too, and know
neither pydantic nor a web framework. None of it knows models or engines.
"""
