"""From the counts of a CRISPR screen to labelled cells: assign guides, and find the cells that responded.

``assignment`` assigns guides by their ``thresholds`` and writes the calibration ``page``. ``targets`` finds the gene of
a guide. ``responding`` measures every perturbation, with ``response`` for its cells.
"""

from vcelltools.screens.assignment import GuideResult, guides
from vcelltools.screens.responding import RespondersResult, responders
from vcelltools.screens.targets import NON_TARGETING, Targets, read_targets

__all__ = ["NON_TARGETING", "GuideResult", "RespondersResult", "Targets", "guides", "read_targets", "responders"]
