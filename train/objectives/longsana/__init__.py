"""LongSANA's training: from a bidirectional video model to a causal one that draws a block in four steps.

SANA-Video, arXiv 2509.24695, §4; self-forcing, arXiv 2506.08009; distribution matching, arXiv 2405.14867. In order:

* ``chunk_causal``: flow matching in causal blocks with noise levels that grow from block to block.
* ``ode``: regression onto the teacher's ODE trajectories at the sampler's few levels.
* ``rollout``, ``dmd`` and ``critic``, joined in ``self_forcing``: the generator makes whole videos with its own state,
  and learns from the difference of two score networks.
* ``windows`` and ``streaming``: the same on windows of a video that grows over many training steps.

``networks`` says how networks are called, and ``world`` how SANA-WM's are, whose streaming student is distilled with
``ode`` and ``self_forcing`` as well: with the camera's path of each block, and the first frame given.
"""
