"""Training: settings, inputs, the training loop, the run folder with its lock, and the evaluation with baselines.

``request`` turns the options of a command into ``settings``. ``inputs`` opens stores and splits, ``cell_inputs`` does
so for models of single cells, and ``length`` sets the number of steps. ``train`` runs the loop, whose computed steps
``in_flight`` reports, ``evaluate`` scores the model and the baselines, ``outcome`` defines results and reasons to stop,
and ``stability`` finds when predictions no longer change. ``boards`` writes metrics for other viewers. ``extend``
continues a finished run, and ``inherit`` starts from the weights of one. ``run_folder`` writes the files of a run and
compares them with the stores. ``diffusion`` trains on single cells. ``sanity`` runs short trainings that check a model,
and ``dry_run`` plans a training. Losses and the training step are in ``model``.
"""
