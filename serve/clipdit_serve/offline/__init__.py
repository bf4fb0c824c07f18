"""Folders of millions: the engine behind `clipdit translate --engine ray`.

engine.py    the engine: what `clipdit.offline.run_job` asks for
cluster.py   a Ray of our own or one that is there, and whether it still lives
stages.py    read, translate, write, as Ray Data calls them: tables in, tables out
reading.py   inputs are decoded in processes that can be killed
"""
