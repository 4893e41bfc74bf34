package docker

import (
	"cmp"
	"context"
	"errors"
	"io"
	"slices"
	"strings"

	"github.com/containerd/errdefs"
	dockerimage "github.com/docker/docker/api/types/image"
	"github.com/docker/docker/api/types/registry"

	"github.com/rai-project/raid/runner/job"
)

// This file finds and removes what builds leave in the engine's store.

// A layer is an image of a build, named or not.
type layer struct {
	ref   string // what is to be removed of it: all, or only its name
	owner string // the build
	depth int    // how many it stands on
}

// sweepImages removes the images of all builds that are not open.
func (e *Engine) sweepImages(ctx context.Context, open func(string) bool) error {
	ctx, cancel := context.WithTimeout(ctx, slow)
	defer cancel()
	all, err := e.api.ImageList(ctx, dockerimage.ListOptions{All: true})
	if err != nil {
		return err
	}
	var errs []error
	for _, l := range e.layers(all) {
		if open(l.owner) {
			continue
		}
		// The untagged parents of an image may be somebody's who builds here by hand.
		_, err := e.api.ImageRemove(ctx, l.ref, dockerimage.RemoveOptions{Force: true, PruneChildren: false})
		if err != nil && !errdefs.IsNotFound(err) {
			errs = append(errs, err)
		}
	}
	return errors.Join(errs...)
}

// layers finds the images of this runner's builds, those on top first. What was pushed
// and then pulled again is the same image: it stays, with what it stands on, and only
// loses the build's name.
func (e *Engine) layers(all []dockerimage.Summary) (found []layer) {
	byID, kept := map[string]*dockerimage.Summary{}, map[string]bool{}
	for i := range all {
		byID[all[i].ID] = &all[i]
	}
	for _, i := range byID {
		if _, foreign := e.tags(i); foreign {
			for ; i != nil && !kept[i.ID]; i = byID[i.ParentID] {
				kept[i.ID] = true
			}
		}
	}
	for id, i := range byID {
		owner, depth := e.owner(byID, id)
		name, _ := e.tags(i)
		switch {
		case owner == "" || kept[id] && name == "":
		case kept[id]:
			found = append(found, layer{e.builtName(name), owner, depth})
		case name != "": // by its names: one that it is given meanwhile, by a pull, keeps it
			for _, tag := range i.RepoTags {
				found = append(found, layer{tag, owner, depth})
			}
		default:
			found = append(found, layer{id, owner, depth})
		}
	}
	slices.SortFunc(found, func(a, b layer) int { return cmp.Or(-cmp.Compare(a.depth, b.depth), cmp.Compare(a.ref, b.ref)) })
	return found
}

// owner walks down to where a build begins, which has a label that what stands on it may
// have changed; "" for no build's.
func (e *Engine) owner(byID map[string]*dockerimage.Summary, id string) (owner string, depth int) {
	for i := byID[id]; i != nil; i = byID[i.ParentID] {
		name, foreign := e.tags(i)
		if foreign && depth > 0 { // a base
			return owner, depth
		}
		if name != "" {
			owner = name
		} else if i.Labels[labelRunner] == e.cfg.ID && i.Labels[labelBox] != "" {
			owner = i.Labels[labelBox]
		}
		depth++
	}
	return owner, depth
}

// tags says for which build an image has a name, and whether it has another by right:
// one that a build's image has only to be pushed is none.
func (e *Engine) tags(i *dockerimage.Summary) (name string, foreign bool) {
	for _, tag := range i.RepoTags {
		if n, ok := strings.CutPrefix(tag, e.builtName("")); ok {
			name = n
		}
	}
	return name, slices.ContainsFunc(i.RepoTags, func(tag string) bool {
		return tag != "<none>:<none>" && !strings.HasPrefix(tag, builtPrefix) && (name == "" || inRegistry(tag, i.RepoDigests))
	})
}

// inRegistry reports whether the repository of a name is known to have the image.
func inRegistry(name string, digests []string) bool {
	return slices.ContainsFunc(digests, func(d string) bool {
		repo, _, _ := strings.Cut(d, "@")
		return sameRepo(name, repo)
	})
}

// push begins a push. The engine tells nobody the credentials, and keeps none.
func (e *Engine) push(ctx context.Context, ref string, who *job.Credentials) (io.ReadCloser, error) {
	var auth registry.AuthConfig
	if who != nil {
		host, _, _ := strings.Cut(ref, "/")
		auth = registry.AuthConfig{Username: who.Username, Password: who.Password, ServerAddress: host}
	}
	encoded, err := registry.EncodeAuthConfig(auth)
	if err != nil {
		return nil, err
	}
	return e.api.ImagePush(ctx, ref, dockerimage.PushOptions{RegistryAuth: encoded})
}

// borrow gives an image the name that it is to have in its registry, which is how the
// engine is told where to push. Whoever may push it there is not known yet: until then no
// other job finds this image by that name (see borrowed). giveBack must be called; it
// takes the name off again, and puts it back on what had it unless that is old news.
func (e *Engine) borrow(ctx context.Context, ref, id string) (giveBack func(pushed bool) error, err error) {
	before, err := e.api.ImageInspect(ctx, ref)
	if err != nil && !errdefs.IsNotFound(err) {
		return nil, err
	}
	if err := e.api.ImageTag(ctx, id, ref); err != nil {
		return nil, err
	}
	return func(pushed bool) error {
		ctx, cancel := context.WithTimeout(context.Background(), slow)
		defer cancel()
		now, err := e.api.ImageInspect(ctx, ref)
		if errdefs.IsNotFound(err) || err == nil && now.ID != id { // somebody pulled it meanwhile
			return nil
		}
		if err != nil {
			return err
		}
		if before.ID != "" && !pushed {
			return e.api.ImageTag(ctx, before.ID, ref)
		}
		_, err = e.api.ImageRemove(ctx, ref, dockerimage.RemoveOptions{})
		return err
	}, nil
}

// borrowed reports whether an image has that name only to be pushed: its other name is a
// build's, and no registry has it.
func borrowed(name string, tags, digests []string) bool {
	return !strings.HasPrefix(name, builtPrefix) && !strings.HasPrefix(name, "sha256:") && !inRegistry(name, digests) &&
		slices.ContainsFunc(tags, func(tag string) bool { return strings.HasPrefix(tag, builtPrefix) })
}
