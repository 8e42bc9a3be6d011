"""Everything that tries to break the whole, under one command, with the counts reported.

    python -m tests.torture --minutes 5 --seed 1

Damaged inputs, flipped bits in stores, damaged containers, SIGKILL at steps and at random moments, full disks: none
may end in a signal, a hang, a wrong number or lost data.
"""
