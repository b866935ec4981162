"""One file per group of routes. Each has `build_router(services)`, so that no route needs a global."""
