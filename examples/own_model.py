"""One's own model, built of fastpeft.nn: LoRA on linear layers, RMSNorm, Excitor's attention, a loss without logits."""

import torch
from torch import Tensor, nn

from fastpeft.nn import ExcitorAttention, LinearCrossEntropy, LoRALinear, MMAdapter, RMSNorm


class Block(nn.Module):
    """A pre-norm layer: adapter and Excitor's attention, then a feed-forward with LoRA."""

    def __init__(self, width: int, heads: int):
        super().__init__()
        self.norm1, self.norm2 = RMSNorm(width), RMSNorm(width)
        self.adapter = MMAdapter(width)
        self.attention = ExcitorAttention(width, heads, num_prompts=10, r=4)
        self.up, self.down = LoRALinear(width, 2 * width, r=4), LoRALinear(2 * width, width, r=4)

    def forward(self, x: Tensor, mask: Tensor) -> Tensor:
        x = x + self.attention(self.adapter(self.norm1(x)), mask)
        return x + self.down(nn.functional.silu(self.up(self.norm2(x))))


class Model(nn.Module):
    """Words in, the loss of the next words out."""

    def __init__(self, vocabulary: int = 200, width: int = 64, layers: int = 2, heads: int = 4):
        super().__init__()
        self.embedding = nn.Embedding(vocabulary, width)
        self.blocks = nn.ModuleList(Block(width, heads) for _ in range(layers))
        self.norm = RMSNorm(width)
        self.loss = LinearCrossEntropy(width, vocabulary)

    def forward(self, ids: Tensor, mask: Tensor, labels: Tensor) -> Tensor:
        x = self.embedding(ids)
        for block in self.blocks:
            x = block(x, mask)
        return self.loss(self.norm(x)[:, :-1], labels[:, 1:])


torch.manual_seed(0)
model = Model()
trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
print(f"{trained:,} of {sum(p.numel() for p in model.parameters()):,} parameters are trained")
optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
ids = torch.randint(0, 200, (4, 16))
mask = torch.arange(16) < torch.tensor([[16], [9], [12], [5]])
labels = torch.where(mask, ids, -100)
for step in range(5):
    loss = model(ids, mask, labels)
    loss.backward()
    optimizer.step()
    optimizer.zero_grad()
    print(f"step {step}: loss {loss.item():.4f}")

for module in model.modules():
    if isinstance(module, LoRALinear):
        module.merge()  # for evaluation: as fast as a plain linear layer
with torch.no_grad():
    print(f"merged: loss {model(ids, mask, labels).item():.4f}")
