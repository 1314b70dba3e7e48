"""Any x86-64 processor, also one without VNNI or AMX.

There ``vpmaddubsw`` multiplies unsigned activations with signed weights and adds neighbouring products in 16 bits,
which saturates. Two products of one sign must fit: 255 * (w1 + w2) <= 32767, so w1 + w2 <= 128, and likewise for
negative weights, where -32768 also gives 128. Products of different signs always fit. Which weights of a filter become
neighbours is up to the kernel's packing, so the two largest of each sign decide. A filter that breaks the bound gets a
larger scale, just large enough; the others keep all 8 bits.
"""

from __future__ import annotations

from dataclasses import replace

from onnxcompress.targets.cpu import CPU

__all__ = ["X86_ANY"]

X86_ANY = replace(
    CPU,
    name="x86-any",
    description="as cpu, with weights that do not saturate on x86 processors without VNNI or AMX",
    weights=replace(CPU.weights, largest_pair=128),
)
