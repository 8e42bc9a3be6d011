"""Submissions to a challenge: ``checks`` of their content, and packing into a ``.vcc`` (``vcc``)."""
