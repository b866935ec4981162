"""One file per group of routes. Each has `build_router(state)`, so that no route needs a global."""
