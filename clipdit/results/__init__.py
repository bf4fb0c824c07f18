"""The comparison: baselines, the paper's recipe, ours and what it is made of, trained for the same time on the same pairs and
judged by the same code.

    methods.py      what is compared: a name, and how an experiment of ours becomes it
    comparison.py   trains, evaluates and times them, one after another; goes on where it was stopped
    tables.py       what was measured, as JSON and Markdown
    figures.py      the architecture, loss curves and unseen pairs as pictures
"""
