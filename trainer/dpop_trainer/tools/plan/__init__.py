"""`dpop plan`: whether a run fits, how long it takes and what it costs, before any hardware is booked.

The step is run on paper: the real model code, the real adapter and this trainer's batches, on tensors that have shapes
and no data. What torch's allocator would be asked for is written on a tape.

    source       a model's configuration, from a folder, a table of known models, or the hub
    paper_model  that model without weights, whole for counting and a few layers deep for running
    stand_ins    what a paper step cannot run: 4-bit products, fused kernels, data-dependent experts
    flat_on_paper  the attention of flat rows
    flash_on_paper  FlashAttention's, of rows
    tape         allocations, and matrix products, as they happen
    step         one training step -> bytes by moment and by part, FLOP; carried on to all layers
    batches      the data's pairs, or lengths that stand for them -> the batches of the run
    memory       per device: what sharding divides and what it gathers
    devices      memory, arithmetic and bandwidth of GPUs, and of this CPU
    timing       seconds per step, from FLOP and bytes
    planner      a run as configured, and what a setting of it takes
    search       the longest pair that fits, the cheapest setting that fits, the nearest that does
    options, setup, report, cli    from the command line and back
"""
