"""Scripts that open a model as its runtime does. Each runs in a process of its own, under any Python that has the runtime, and
never imports this library (but for artifacts in its own format, which need it).

    python SCRIPT MODEL IDS.safetensors OUT.safetensors METHOD PROOF

IDS holds ``ids`` (rows, length) int64, OUT gets ``logits`` (rows, length, vocabulary) float32 and, where the runtime computes in narrow
types by itself, ``decoded`` alike: from the weights as it decodes them, in float32; llama.cpp also ``tokens.N``, the ids of the N-th text in
the model's proof/tokens.json. Exit status 3: the last line names the missing package.
"""
