"""State: pictures of parameters and buffers by name, and what differs between two.

Whatever a side is (a model, a snapshot, a state dict, a file), it becomes a `State` (`entries`), read from a model
(`snapshot`), from a mapping or from a file (`checkpoints`), whose pages are given back as soon as they have been
compared (`mapped`). `compare` finds what belongs together, by the `names` that both have in common, and has each pair
of tensors compared by `amounts`, in pieces; what comes out is a `StateDiff` (`diff`).
"""
