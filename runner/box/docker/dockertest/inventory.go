package dockertest

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"os"
	"slices"
	"strings"
	"sync"

	"github.com/docker/docker/api/types/container"
	dockerimage "github.com/docker/docker/api/types/image"
	"github.com/docker/docker/api/types/network"
	"github.com/docker/docker/api/types/volume"
)

// Inventory lists what is in the engine: containers, volumes, networks and images, and,
// where it is the lab's own, its mounts. Two lists of an engine at rest that differ show
// what has come or gone between them.
func (l *Lab) Inventory(ctx context.Context) (all []string, err error) {
	containers, cerr := l.api.ContainerList(ctx, container.ListOptions{All: true})
	for _, c := range containers {
		all = append(all, fmt.Sprint("container ", c.Names, c.Status))
	}
	volumes, verr := l.api.VolumeList(ctx, volume.ListOptions{})
	for _, v := range volumes.Volumes {
		all = append(all, "volume "+v.Name)
	}
	networks, nerr := l.api.NetworkList(ctx, network.ListOptions{})
	for _, n := range networks {
		all = append(all, "network "+n.Name)
	}
	images, ierr := l.api.ImageList(ctx, dockerimage.ListOptions{All: true})
	for _, i := range images {
		all = append(all, fmt.Sprint("image ", i.ID, i.RepoTags))
	}
	mounts, merr := os.ReadFile("/proc/self/mountinfo")
	for line := range bytes.Lines(mounts) {
		if f := strings.Fields(string(line)); l.dir != "" && len(f) > 4 && strings.HasPrefix(f[4], l.dir) {
			all = append(all, "mount "+f[4])
		}
	}
	slices.Sort(all)
	return all, errors.Join(cerr, verr, nerr, ierr, merr)
}

// Watch notes the id of every container that is started from now on. stop ends that and
// returns them.
func (l *Lab) Watch() (stop func() []string) {
	var ids []string
	var wg sync.WaitGroup
	ctx, cancel := context.WithCancel(context.Background())
	begun := l.starts(ctx)
	wg.Go(func() {
		for e := range begun {
			ids = append(ids, e.Actor.ID)
		}
	})
	return func() []string {
		cancel()
		wg.Wait()
		return ids
	}
}
