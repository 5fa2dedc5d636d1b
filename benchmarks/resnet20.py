"""ResNet-20 on CIFAR-10 against other ways to integers: `make bench-resnet20`."""

import sys

from against_rivals import Promise, hold

if __name__ == "__main__":
    sys.exit(hold("resnet20", Promise("recipes/cifar10_resnet20.yaml", 0.01, 1.5)))
