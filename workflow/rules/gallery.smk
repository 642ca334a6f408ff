# Not part of `all`: request it by its folder.
rule gallery:
    input:
        similarity=SIMILARITY,
        labels=PSEUDO_LABELS,
        refined=REFINED,
        predictions=PREDICTIONS,
        images=IMAGES,
    output:
        directory(below(results.GALLERY)),
    log:
        f"{LOGS}/gallery/{{dataset}}/{{encoder}}/{{labels}}/{{training}}/{{split}}.log",
    threads: 8
    params:
        training=subpath(input.refined, parent=True),
        code=code("gallery", "make_gallery"),
        page=[digest(PACKAGE / name) for name in ("gallery", "shared")],
    shell:
        "cdul gallery {params.training:q} --split {wildcards.split} --output {output:q} 2> {log:q}"
