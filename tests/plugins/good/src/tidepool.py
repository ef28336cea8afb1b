"""A host that knows nothing of memhook: one batched call a step, the conditional half first, answered in a dict."""

import torch
from torch import nn

WORDS = {"": 0.0, "a lighthouse at dusk": 1.0, "two red apples": -1.0}


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        maker = torch.Generator().manual_seed(0)
        self.mix = nn.Parameter(torch.randn(16, 16, generator=maker) / 4)
        self.read = nn.Parameter(torch.randn(6, 16, generator=maker))

    def forward(self, *, latents, level, text):
        pull = torch.tanh(text @ self.read).mean(1)  # (b, 16)
        return {"pred": torch.sin(latents @ self.mix + pull + level)}


class Sampler:
    def __init__(self):
        self.net = Net()

    @torch.no_grad()
    def generate(self, prompts, *, scale=5.0, steps=4):
        text = torch.stack([torch.full((3, 6), WORDS[prompt]) for prompt in prompts])
        x = torch.ones(len(prompts), 16)
        for step in range(steps, 0, -1):
            if scale > 1:
                both = self.net(latents=torch.cat([x, x]), level=step / steps, text=torch.cat([text, torch.zeros_like(text)]))
                cond, uncond = both["pred"].chunk(2)
                predicted = uncond + scale * (cond - uncond)
            else:
                predicted = self.net(latents=x, level=step / steps, text=text)["pred"]
            x = x - predicted / steps
        return x
