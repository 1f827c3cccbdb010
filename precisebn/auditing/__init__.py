"""Auditing: mistakes with BatchNorm, found before they cost a training run.

A *check* (``checks/``, one file a subject) looks at a *subject* (``subject.py``: the model and what was given with it)
and at *observations* of it (``observations/``: what happens in a forward, which gradients come), each made once however
many checks ask, and leaves nothing behind. What it says is a *finding* (``finding.py``).
"""
