"""The models, in JAX. They work on arrays and never open a file.

- Models of effects: ``registry`` lists them. ``baselines``, ``neighbours``, ``kernel_ridge`` and ``transfer`` define
  them, ``direction`` keeps effects of different directions apart, ``context`` uses what the controls say,
  ``combination`` predicts combinations from their parts,
  ``nested`` chooses their parameters, and ``evidence`` weights the prior effects.
- The transformer over sets of cells: ``network``, ``optimizers``, ``step``, ``metrics``. ``loss_registry`` lists its
  losses, which ``losses``, ``sinkhorn`` and ``effect_losses`` define.
- The ``diffusion`` model over the genes of a cell, and ``diffusion_plan``, which compiles it for a TPU.
- Coefficients that vary over a tissue: ``local_betas``.
- Machines: ``mesh`` (devices), ``topology`` (figures from the TPU compiler), ``checkpoint``.
"""
