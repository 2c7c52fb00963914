"""What the checks share: the network, the samples, and the attacks that were already run on them."""

from __future__ import annotations

import warnings

import torch
from torch import Tensor, nn

from ...callbacks.attacks.base import Attack, ObjectiveName
from ...callbacks.attacks.draws import SampleDraws
from ...callbacks.attacks.fgsm import FGSM
from ...callbacks.attacks.pgd import PGD
from ...functional.geometry import Norm
from .subject import Subject


class Evidence:
    """Samples of a network under audit, and which of them stand against which attack.

    Attacks run on the samples that the network classifies correctly; accuracies are over all.

    Args:
        net: in eval mode.
        x: pixels (n, C, H, W) in [0, 1], in the precision that the network is fed with.
        y: classes (n,).
        eps: radius in units of the pixel range.
        norm: ``linf`` or ``l2``.
        seed: of every random number here.
        batch_size: samples that go through the network at once.
        steps: of PGD, where a check does not say otherwise.
    """

    def __init__(
        self, net: nn.Module, x: Tensor, y: Tensor, *, eps: float, norm: Norm, seed: int, batch_size: int, steps: int
    ) -> None:
        self.net, self.subject, self.dtype = net, Subject(net, batch_size, x.dtype), x.dtype
        # Half precision is for the network: small changes of an image would be lost in it.
        self.x = x.to(torch.promote_types(x.dtype, torch.float32))
        self.y, self.eps, self.norm = y, eps, norm
        self.seed, self.batch_size, self.steps = seed, batch_size, steps
        self.clean = self.predict(x)
        self.right = (self.clean.argmax(1) == y).nonzero().squeeze(1)
        self._stands: dict[tuple[object, ...], Tensor] = {}

    @property
    def samples(self) -> int:
        return len(self.x)

    def some(self, most: int) -> tuple[Tensor, Tensor, Tensor]:
        """The first so many of the correctly classified samples: x, y, and their positions."""
        rows = self.right[:most]
        return self.x[rows], self.y[rows], rows

    def draws(self, check: str, rows: Tensor) -> SampleDraws:
        """Random numbers of one check for the samples at ``rows``."""
        return SampleDraws((self.seed, "masking", check), rows)

    def predict(self, x: Tensor) -> Tensor:
        """Logits without a graph, (n, C, H, W) -> (n, K)."""
        return self.subject.predict(x)

    def pgd(
        self, *, eps: float | None = None, steps: int | None = None, norm: Norm | None = None, objective: ObjectiveName = "ce"
    ) -> Tensor:
        """Whether each sample stands against PGD from x itself, bool (n,); FGSM if ``steps`` is 1."""
        eps, steps, norm = self.eps if eps is None else eps, steps or self.steps, norm or self.norm
        if norm == "linf":
            eps = min(eps, 1.0)
        key = (eps, steps, norm, objective)
        if key not in self._stands:
            settings = {"norm": norm, "random_start": False, "objective": objective, "seed": self.seed}
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # that four times the radius is a large one
                attack = FGSM(eps, **settings) if steps == 1 else PGD(eps, steps=steps, **settings)
            stands = torch.zeros(self.samples, dtype=torch.bool, device=self.x.device)
            y = self.y[self.right]
            stands[self.right] = self.under(attack, self.right, y) == y
            self._stands[key] = stands
        return self._stands[key]

    def under(self, attack: Attack, rows: Tensor, y: Tensor) -> Tensor:
        """Classes that the network says for the samples at ``rows`` (m,) under an attack that is given ``y`` (m,)."""
        said = [y[:0]]
        for index, labels in zip(rows.split(self.batch_size), y.split(self.batch_size), strict=True):
            if len(index):
                # careful=False: an attack refuses networks whose values are odd, and these are the ones looked for.
                attacked = attack.run(self.subject, self.x[index], labels, index=index, careful=False)
                said.append(self.predict(attacked.x_adv).argmax(1))
        return torch.cat(said)
