"""Pages on which people look at rollouts: groups at a glance, a sample through its steps, samples side by side.

The HTML is made here, with Jinja's templates, and the charts are matplotlib's SVG, so that a page needs no library in the
browser, no network and no build, can be saved as one file, and every number on it can be tested without a browser. (gradio,
which this field knows, brings 30 packages and a web application that looks for its fonts elsewhere.) A script of a few lines
moves the slider; without it the pages are read all the same.

    source   what is looked at: a store, or files
    steps    a sample through its steps: numbers and pictures
    charts   the charts
    pages    what each page says
    app      the routes
"""

from flowroll.extras import extra_for

with extra_for("flowroll.viewer", "server"):
    from flowroll.viewer.app import viewer_router
    from flowroll.viewer.pages import Pages
    from flowroll.viewer.source import Model, Source

__all__ = ["Model", "Pages", "Source", "viewer_router"]
