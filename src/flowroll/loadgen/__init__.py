"""A load generator for any server with flowroll's API: a plan of requests, the run, the report."""
