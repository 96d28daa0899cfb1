"""The protocols of the fused collectives as models that can be run in every order.

    plan       a split plan -> the calls of each rank -> can that fail?   check(...)
    calls      what a rank asks of a collective, and how ranks come to differ
    rules      what FlashInfer releases changed
    mnnvl, trtllm, moe_a2a      a rank's call -> its ops; control words word by word
    compiler   a rank's calls -> its launches, each made when it is looked at
    machine    what ops do, and what a failure is
    explore    every order, a shortest trace
    order, run, decide      one order that speaks for all, for programs of any length
    walk       the same, where equal calls are made once
    answer     the row of the hazard table that explains a failure
    timeline   a trace as text, SVG and JSON

Plain Python: nothing here needs torch or a device.
"""
