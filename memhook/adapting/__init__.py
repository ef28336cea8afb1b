"""What adapters that hook modules need: pairing predictions, running a call again, hooks that clean up.

Lives here:

    pairs          from a denoiser's raw calls to the two predictions of one guided evaluation
    replay         running a captured call again, with another embedding
    substitution   an intervention's embedding or prediction in the place of the host's own
    hooks          hooks that see every call of a module inside a block, and leave nothing behind
    module         `ModuleAdapter`, for any bare denoiser that is called with guided batches
    module_calls   how a bare denoiser's guided calls are laid out
    whole_batch    replays of the conditional rows alone where that works, of the whole batch where
                   it must be
    kept_state     caches that a model keeps between calls, put aside while a call is made again
    checkpointing  gradient checkpointing of repeated blocks, for the time of a replay
    fingerprint    telling models apart
    tensors        nested arguments, rows of a batch, exact fingerprints
    snapshots      what a fingerprint is made of: parameters' names, shapes and a little of their
                   values
    alterations    what was done to a model beside its own weights: adapters (LoRA), quantization,
                   patched methods, attention processors
    call_setting   what a call shows of the setting: the scale it gives adapters, what it is
                   conditioned on beside the text
    arguments      a call's arguments as they were when it was made
    copies         copies and pickles of a watched object, without memhook
    listeners      who listens, as a list that may change at any moment
    moments        what is kept of a tensor's values, of all tensors of a model in one transfer

May use: `memhook.capture` and what it uses. Used by: adapters, and every later room that asks a
model again.
"""
