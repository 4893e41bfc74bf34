package job

import (
	"fmt"
	"net/netip"
	"path"
	"regexp"
	"slices"
	"strings"
)

// An ImageBuild asks a runner to build the image that the steps run in, from a
// Dockerfile of the source. It holds no secret: it goes into boxes.
type ImageBuild struct {
	Name       string     `json:"name,omitempty"` // what the project calls the image, "" for nothing
	Dockerfile string     `json:"dockerfile"`     // in the source, without "." and ".."
	Push       *ImagePush `json:"push,omitempty"` // nil: the image goes when the job does
}

// An ImagePush is where an image goes once the steps have succeeded.
type ImagePush struct {
	Registry string `json:"registry"` // host, or host:port
	Image    string `json:"image"`    // repository and tag
}

// Ref is the whole name the image has there.
func (p *ImagePush) Ref() string { return p.Registry + "/" + p.Image }

// Credentials are what somebody shows to a registry. They travel in offers and are
// kept nowhere.
type Credentials struct {
	Username string `json:"username"`
	Password string `json:"password"`
}

// String keeps the password out of whatever prints credentials.
func (c Credentials) String() string { return c.Username }

// GoString implements [fmt.GoStringer] for the same reason.
func (c Credentials) GoString() string { return c.Username }

// PushEnv is the variable of an SSH session that holds what its owner shows to a registry,
// for a build file that pushes without credentials of its own; see FormatPush.
const PushEnv = "RAI_PUSH"

// FormatPush writes a registry and credentials for it: three words, of which the last, the
// password, may have spaces.
func FormatPush(registry string, c Credentials) string {
	return registry + " " + c.Username + " " + c.Password
}

// ParsePush reads what FormatPush wrote. ok is false if a word is missing.
func ParsePush(text string) (registry string, c Credentials, ok bool) {
	registry, rest, _ := strings.Cut(text, " ")
	c.Username, c.Password, _ = strings.Cut(rest, " ")
	return registry, c, registry != "" && c.Username != "" && c.Password != ""
}

// Builds says that a runner builds images, and where it may push them to.
type Builds struct {
	Registries []string `json:"registries,omitempty"` // globs, see RegistryAllowed
}

// Push reports whether images may be pushed to a registry; "" is no push.
func (b *Builds) Push(registry string) bool {
	return b != nil && (registry == "" || RegistryAllowed(registry, b.Registries))
}

// NoPush is what people read about a registry that no runner pushes to.
func NoPush(registry string) string {
	return fmt.Sprintf("images may not be pushed to %q from here; staff would add it to raid.toml: [box] registries = [%q]", registry, registry)
}

// RegistryAllowed reports whether one of the globs, as in path.Match, fits a registry's
// host, or host:port. A host that is the runner's own machine or network, in whatever
// form, has to stand there letter by letter: no * reaches it.
func RegistryAllowed(registry string, globs []string) bool {
	if slices.Contains(globs, registry) {
		return true
	}
	if nearby(registry) {
		return false
	}
	return slices.ContainsFunc(globs, func(g string) bool {
		ok, err := path.Match(g, registry)
		return ok && err == nil
	})
}

// nearby reports whether a host is named by an address, or is the machine itself: there
// are more ways to write such a thing than to check it.
func nearby(registry string) bool {
	host := registry
	if i := strings.LastIndexByte(host, ':'); i >= 0 && !strings.HasSuffix(host, "]") {
		host = host[:i]
	}
	host = strings.TrimSuffix(strings.Trim(host, "[]"), ".")
	if _, err := netip.ParseAddr(host); err == nil || host == "localhost" || strings.HasSuffix(host, ".localhost") {
		return true
	}
	last := host[strings.LastIndexByte(host, '.')+1:]
	if last == "internal" || last == "local" || last == "localdomain" { // where clouds keep what a machine may know
		return true
	}
	return last == "" || last[0] >= '0' && last[0] <= '9' || !strings.Contains(host, ".") // 0x7f.1, 2130706433, metadata
}

var (
	registryForm   = regexp.MustCompile(`^(?:[a-z0-9](?:[a-z0-9-]*[a-z0-9])?(?:\.[a-z0-9](?:[a-z0-9-]*[a-z0-9])?)*|\[[0-9a-f:]+\])(?::[0-9]{1,5})?$`)
	repositoryForm = regexp.MustCompile(`^[a-z0-9]+(?:(?:\.|_{1,2}|-+)[a-z0-9]+)*(?:/[a-z0-9]+(?:(?:\.|_{1,2}|-+)[a-z0-9]+)*)*(?::[A-Za-z0-9_][A-Za-z0-9._-]{0,127})?$`)
)

// Order makes of what a build file says what a runner is asked to do. The errors are
// for whoever wrote the file.
func (i *BuildImage) Order() (*ImageBuild, error) {
	b := &ImageBuild{Name: i.ImageName, Dockerfile: path.Clean(i.Dockerfile)}
	if i.Dockerfile == "" {
		b.Dockerfile = "Dockerfile"
	}
	if len(i.Dockerfile) > 1024 || path.IsAbs(b.Dockerfile) || b.Dockerfile == "." || b.Dockerfile == ".." || strings.HasPrefix(b.Dockerfile, "../") || strings.ContainsAny(b.Dockerfile, "\x00\n") {
		return nil, fmt.Errorf("dockerfile: %s is no file of the project", shown(i.Dockerfile))
	}
	if b.Name != "" && !imageName(b.Name) {
		return nil, fmt.Errorf("image_name: %s is no name of an image; it looks like: team7/mxnet:v2", shown(b.Name))
	}
	if i.Push == nil || !i.Push.Push {
		return b, nil
	}
	var err error
	b.Push, err = i.Push.order(i.ImageName)
	return b, err
}

func imageName(name string) bool {
	if len(name) > 255 {
		return false
	}
	if host, rest, ok := strings.Cut(name, "/"); ok && registryForm.MatchString(host) && repositoryForm.MatchString(rest) {
		return true
	}
	return repositoryForm.MatchString(name)
}

// order finds the registry in its own field or in the image's name. RAI meant Docker
// Hub whatever was written; here somebody has to say so.
func (p *BuildPush) order(name string) (*ImagePush, error) {
	image, registry := p.ImageName, strings.TrimSuffix(strings.TrimPrefix(p.Registry, "https://"), "/")
	if image == "" {
		image = name
	}
	if image == "" {
		return nil, fmt.Errorf("push: image_name is missing")
	}
	host, rest, ok := strings.Cut(image, "/")
	if named := ok && (strings.ContainsAny(host, ".:") || host == "localhost"); named {
		if registry != "" && registry != host {
			return nil, fmt.Errorf("push: registry is %s, and image_name names %s", shown(registry), shown(host))
		}
		registry, image = host, rest
	}
	switch {
	case registry == "":
		return nil, fmt.Errorf("push: registry is missing; Docker Hub's is docker.io")
	case !registryForm.MatchString(registry):
		return nil, fmt.Errorf("push: registry %s is no host; it looks like: registry.example.edu", shown(registry))
	case !repositoryForm.MatchString(image) || len(image) > 255:
		return nil, fmt.Errorf("push: image_name %s is no name of an image; it looks like: team7/mxnet:v2", shown(image))
	}
	return &ImagePush{Registry: registry, Image: image}, nil
}
