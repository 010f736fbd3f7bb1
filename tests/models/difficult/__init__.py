"""What makes serializers stumble, by name; each file has the entries of one kind."""

from models.difficult import arrays, classes, graphs, hf, modules, objects, weights

DIFFICULT = {
    name: factory
    for kind in (weights, modules, arrays, classes, graphs, objects, hf)
    for name, factory in kind.TABLE.items()
}
