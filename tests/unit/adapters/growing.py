"""Adapted layers that train in plain PyTorch through RankGrowth and its optimizer, in pieces as ZeRO cuts them."""

import torch

from ccmdist.adapters.growth import Piece, RankGrowth
from ccmdist.adapters.injection import inject, row_squares_of
from ccmdist.config.train import OptimSettings
from ccmdist.train.optim import GrowingAdamW


class Cut:
    """One rank's pieces of the parameters, as ZeRO-3 lays them out: each is cut evenly and its end is padded."""

    def __init__(self, parameters, world_size=1, global_rank=0):
        self.parameters, self.pieces, offset = parameters, {}, 0
        for name, parameter in parameters.items():
            length = -(-parameter.numel() // world_size)
            start = min(global_rank * length, parameter.numel())
            count = min(start + length, parameter.numel()) - start
            self.pieces[name] = Piece(offset, count, start, tuple(parameter.shape))
            offset += length
        self.num = offset

    def flat(self, of=lambda parameter: parameter.detach()):
        like = next(iter(self.parameters.values()))
        flat = torch.full((self.num,), 9e9, dtype=like.dtype)  # padding must count nowhere
        for name, piece in self.pieces.items():
            piece.of(flat).copy_(of(self.parameters[name]).reshape(-1)[piece.start : piece.start + piece.count])
        return flat

    def gradient(self):
        return self.flat(lambda p: p.grad if p.grad is not None else torch.zeros_like(p))


class GrowingRun:
    """Adapters on ``model`` on one rank, and what a training step of theirs is."""

    def __init__(self, model, settings, names=None, lr=1e-2, seed=0, **optim):
        model.requires_grad_(False)
        names = names or [name for name, module in model.named_modules() if isinstance(module, torch.nn.Linear)]
        self.adapted = inject(model, names, settings, row_squares_of(model, names), seed)
        self.settings = settings
        self.model, self.cut = model, Cut(self.adapted.parameters)
        self.growth = RankGrowth(names, settings.lora_rank, settings.growth)
        self.flat = torch.nn.Parameter(self.cut.flat())
        self.growth.place(self.cut.pieces, self.flat)
        self.optimizer = GrowingAdamW({"adapter": [self.flat]}, OptimSettings(lr=lr, **optim))
        self.optimizer.begin(self.flat)
        self.optimizer.set_births(self.flat, self.growth.born)

    @property
    def num_steps(self):
        return int(self.optimizer.state[self.flat]["step"])

    def step(self, loss):
        """One update for ``loss``; name -> ratio of the layers that have grown after it."""
        for parameter in self.adapted.parameters.values():
            parameter.grad = None
        loss.backward()
        self.flat.grad = self.cut.gradient()
        squares = self.growth.look(self.flat.grad)
        self.optimizer.step()
        with torch.no_grad():
            for name, parameter in self.adapted.parameters.items():
                parameter.copy_(self.cut.pieces[name].of(self.flat).view_as(parameter))
        self.adapted.advance()
        self.growth.add(squares, list)
        return self.growth.grow(self.num_steps)
