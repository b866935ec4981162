"""What flowroll says over HTTP and on disk: requests in, rollouts out.

Owns every wire name. A message is one class (msgspec) for both sides: the server parses by it and describes it in the OpenAPI
document, the client encodes it. None of it knows models, engines or web frameworks.
"""
