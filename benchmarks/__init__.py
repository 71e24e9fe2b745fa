"""The benchmark suite, installed as ``ncsn_fast.benchmarks``: one set of cases for ``ncsn-fast bench`` and for pytest.

====================  ==================================================================================
``cases/``            what is measured: one file an operator, or a part of the network's work
``suite.py``          a case and its peers; runs a case: correctness, modes, interleaved times
``peers.py``          makes the peers: eager, torch.compile and each backend; proves that each is what it says
``engines.py``        inference engines as peers of the network, each in the process of ``engine_child.py``
``plain_torch.py``    the network and its loops as one writes them in plain PyTorch: what we are compared with
``measure.py``        the clock, the load of the machine, memory, and the limits of the hardware
``tf32.py``           TF32 off for float32, or on
``results.py``        a result, its file formats, and what changed between two files
``comparisons.py``    what tables and plots have in common: families of peers, series, numbers
``report.py``         Markdown tables and reports
``figures.py``        plots
``documents.py``      the project's documents: marked blocks, pictures and raw tables, written and checked
``quality.py``        distance to data against passes and seconds, of every sampler
``command.py``        ``ncsn-fast bench``
====================  ==================================================================================
"""
