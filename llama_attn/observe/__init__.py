"""How a forward of any transformers model is observed.

`recording` is what users open; `interface` is where attention calls are seen; `forward` measures one forward of one
stack of attention layers, `course` puts forwards one after another, `stacks` tells the stacks of a model apart;
`hidden` and `projection` see what the calls do not show. `generation`, `training`, `pipelining` and `outputs` are
what the Llama and the Trainer need besides.
"""
