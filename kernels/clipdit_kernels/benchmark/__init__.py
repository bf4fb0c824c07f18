"""How fast the kernels are, against named peers, in one run on one GPU.

timing.py      calls as CUDA graphs, replayed in turns
ceilings.py    what the GPU can do: copies, products, nodes of a graph
cases.py       each fused operation at each size: its input, its peers, what it must read, write and multiply
peers.py       the peers, by name, and why one cannot run
operations.py  measures the cases: `clipdit bench kernels`
sampling.py    measures whole loops: `clipdit bench sampling`
ledger.py      the record, keyed by a hash of the kernels' sources; what is kept with the package
report.py      tables and plots of a record
"""
