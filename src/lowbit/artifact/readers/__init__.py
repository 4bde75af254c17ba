"""Scripts that open a model as its runtime does. Each runs in a process of its own, under any
Python that has the runtime, and never imports this library (but for artifacts in its own format,
which need it).

    python SCRIPT MODEL METHOD PROOF LAST LOAD < IDS > FOUND

IDS and FOUND are safetensors files, through pipes: a reader leaves nothing on a disk. IDS holds
``ids`` (rows, length) int64, FOUND gets ``logits`` (rows, LAST, vocabulary) float32 of the last
positions and, where the runtime computes in narrow types by itself, ``decoded`` alike: from the
weights as it decodes them, in float32; llama.cpp also ``tokens.N``, the ids of the N-th text in the
model's proof/tokens.json. LOAD is "whole" or "blocks"; where the model was loaded block by block,
``blocks`` is their number (int64, one).

Exit status 3: FOUND names the missing packages. 4: it says why the model cannot be read. 5: it says
what the machine lacked; any other says as little about the model as that. `exchange` has the rules.
"""
