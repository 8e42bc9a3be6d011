"""The HTML report of a score: ``data`` prepares its plots, ``report`` writes the page."""
