"""What fastsplit is measured against: other ways to do the same split, HF in one process, and the raw socket.

    messages.py     tensors in zmq messages, two ways: the original system's, and the same tuned
    backend.py      the TEE side: a `fastsplit.tee.remote.Backend`, so that the very same Runner drives all systems
    service.py      the GPU side: a REP socket in a thread, computing with an Executor's own weights
    executor.py     a process that serves fastsplit and the rivals out of one copy of the weights
    hf.py           a process that runs the same weights in HF's own class, undivided

Rules. What is called original is the original system's way, written afresh: zmq REQ/REP, msgpack, `tobytes()` on the
way out and `frombuffer().copy()` on the way in, linear operations of the same input batched (6 calls a layer and 2),
the KV cache on the TEE side, key and value heads repeated to all heads before they are sent, the whole square of
scores. Where there was a choice, it was made in the rival's favour: it is given the causal mask that it lacked, the
last layer's saving, the attention's scale within the product, and tensors that lie as the Runner has them, without the
transposes on the TEE side that the original made.
"""
