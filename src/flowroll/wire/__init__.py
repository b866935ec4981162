"""The messages of flowroll over HTTP and on disk: requests in, rollouts out.

Owns every wire name. A message is one class (msgspec) for both sides: the server parses by it and describes it in the OpenAPI
document, and the client encodes it. This package does not know models, engines or web frameworks.
"""
