"""One module a verb: chunks go through kernels into a frozen result.

The modules live here, beside each other, so that ``vc.hvg`` is the function and never its module.
"""
