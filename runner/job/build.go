package job

import (
	"cmp"
	"fmt"
	"math"
	"regexp"
	"strconv"
	"strings"
	"time"

	"github.com/goccy/go-yaml/ast"
)

// BuildFileName is where a project says how it is to be built, at its top.
const BuildFileName = "rai_build.yml"

// BuildTemplate is a build file to begin with; it parses without a note.
const BuildTemplate = `rai:
  version: 0.2
  # image: nvidia/cuda:12.4.1-devel-ubuntu22.04  # else the course decides
resources:
  gpu:
    count: 1            # leave gpu out for a job without one
  # network: true       # if you may
  limits:
    time: 10m
commands:
  build:                # run in /build; your files are in /src
    - cmake /src
    - make
    - './main "a: b"'   # quote a command that holds ": " or " #"
`

// A Build is what a rai_build.yml says, as it says it: roles, limits and what a
// runner has come later. Every file written for RAI has one.
type Build struct {
	Version    string
	Image      string
	CPUArch    string
	GPU        *BuildGPU // nil for none
	Network    bool      // resources.network or resources.limits.network
	Time       time.Duration
	Memory     int64 // bytes
	TTY        bool  // tty, at the top or in resources: the steps' stdout is a terminal
	Cache      bool  // resources.cache: the team's folder, where the pool has one
	Steps      []string
	BuildImage *BuildImage // nil for none
}

// BuildGPU is resources.gpu. Count is as written, 1 if it is not: people who ask for
// an architecture want a GPU.
type BuildGPU struct {
	Count    int
	Arch     string
	MemoryMB int64 // MiB
}

// BuildImage is commands.build_image: an image to be made before the steps run in it.
type BuildImage struct {
	ImageName, Dockerfile string
	NoCache               bool
	Push                  *BuildPush // nil for no push section
}

// BuildPush is commands.build_image.push.
type BuildPush struct {
	Push                bool
	ImageName, Registry string
	Username, Password  string
}

// MaxBuildFile is how many bytes a build file may have. Real ones have a few hundred;
// the YAML library takes a second for the worst of this length, and sixteen for four times that.
const MaxBuildFile = 64 << 10

// ParseBuild reads a build file. Notes are for what is odd but does no harm, unknown
// keys above all, in the order of the file; they come beside an error, too. An error
// is a [*BuildError] and says where and, if it can, how to mend it. Limits that are
// not written are zero, a file without commands has no Steps: neither is an error.
//
// A byte order mark, CRLF, aliases and merge keys are understood. Booleans may be
// yes, no, on and off as in YAML 1.1, which RAI read. What the quotes of /bin/bash -c "…"
// hold, that shell expands. Times are durations (1h30m) or
// seconds, sizes are as [ParseSize] has them.
func ParseBuild(text []byte) (*Build, []BuildNote, error) {
	f, root, err := readYAML(text)
	if err != nil {
		return nil, nil, err
	}
	b := &Build{}
	if err := f.build(b, root); err != nil {
		return nil, f.sorted(), err
	}
	return b, f.sorted(), nil
}

func (f *yamlFile) build(b *Build, root ast.Node) error {
	if root == nil {
		f.note(nil, "the file is empty")
		return nil
	}
	return f.mapping(root, "", fields{
		"rai": func(n ast.Node) error {
			return f.mapping(n, "rai", fields{"version": f.text(&b.Version), "image": f.text(&b.Image)})
		},
		"resources": func(n ast.Node) error { return f.resources(b, n) },
		"commands":  func(n ast.Node) error { return f.commands(b, n) },
		"tty":       f.yes(&b.TTY),
	})
}

func (f *yamlFile) resources(b *Build, n ast.Node) error {
	return f.mapping(n, "resources", fields{
		"cpu": func(n ast.Node) error {
			return f.mapping(n, "resources.cpu", fields{"architecture": f.machine(&b.CPUArch)})
		},
		"gpu":     func(n ast.Node) error { return f.gpu(b, n) },
		"network": f.yes(&b.Network),
		"limits": func(n ast.Node) error {
			return f.mapping(n, "resources.limits", fields{
				"network": f.yes(&b.Network), "time": f.duration(&b.Time), "memory": f.bytes(&b.Memory),
				"datasize": f.nothing,
			})
		},
		"tty":           f.yes(&b.TTY),
		"cache":         f.wish(&b.Cache), // RAI's lab files have it; it never did anything there
		"dataresources": f.nothing,
	})
}

func (f *yamlFile) gpu(b *Build, n ast.Node) error {
	b.GPU = &BuildGPU{Count: 1}
	return f.mapping(n, "resources.gpu", fields{
		"count": f.whole(&b.GPU.Count), "architecture": f.text(&b.GPU.Arch),
		"memory": func(n ast.Node) error { return f.mebibytes(&b.GPU.MemoryMB, n) },
	})
}

func (f *yamlFile) commands(b *Build, n ast.Node) error {
	return f.mapping(n, "commands", fields{
		"build":       func(n ast.Node) error { return f.steps(&b.Steps, n) },
		"build_image": func(n ast.Node) error { return f.buildImage(b, n) },
	})
}

func (f *yamlFile) buildImage(b *Build, n ast.Node) error {
	i := &BuildImage{}
	b.BuildImage = i
	return f.mapping(n, "commands.build_image", fields{
		"image_name": f.text(&i.ImageName), "dockerfile": f.text(&i.Dockerfile),
		"no_cache": f.yes(&i.NoCache), "nocache": f.yes(&i.NoCache), // RAI's README has both
		"push": func(n ast.Node) error {
			i.Push = &BuildPush{}
			return f.push(i.Push, n)
		},
	})
}

func (f *yamlFile) push(p *BuildPush, n ast.Node) error {
	return f.mapping(n, "commands.build_image.push", fields{
		"push": f.yes(&p.Push), "image_name": f.text(&p.ImageName), "registry": f.text(&p.Registry),
		"credentials": func(n ast.Node) error {
			return f.mapping(n, "commands.build_image.push.credentials",
				fields{"username": f.text(&p.Username), "password": f.text(&p.Password)})
		},
	})
}

// steps reads commands.build. What YAML made something else of than a string was a
// command that needs quotes.
func (f *yamlFile) steps(to *[]string, n ast.Node) error {
	n, err := f.resolve(n)
	if err != nil {
		return err
	}
	list, ok := n.(*ast.SequenceNode)
	if !ok {
		s, err := f.scalar(n, "a list of commands")
		if err != nil {
			return err
		}
		f.note(n, "build should be a list; taken as one command")
		return f.step(to, s, n)
	}
	for _, item := range list.Values {
		v, err := f.resolve(item)
		if err != nil {
			return f.unquoted(item, err)
		}
		s, err := f.scalar(v, "a command")
		if err != nil {
			return f.unquoted(item, err)
		}
		if err := f.step(to, s, item); err != nil {
			return err
		}
	}
	return nil
}

func (f *yamlFile) step(to *[]string, s string, n ast.Node) error {
	if strings.IndexByte(s, 0) >= 0 {
		return f.fail(n, "", "a command cannot hold a NUL")
	}
	if strings.TrimSpace(s) != "" {
		*to = append(*to, innerShell(s))
	}
	if m := forItself.FindStringSubmatch(s); m != nil {
		f.note(n, "this %s ends with its line: the next command begins in /build anew", m[1])
	}
	return nil
}

// shellCall matches a shell that is given its commands in double quotes.
var shellCall = regexp.MustCompile(`(?s)^(\s*(?:/usr)?(?:/bin/)?(?:ba)?sh\s+-[a-z]*c\s+)"((?:[^"\\]|\\.)*)"($|[\s;&|<>].*)`)

// innerShell leaves what stands in the double quotes of such a call to the shell that is
// called, as RAI did, which had none around it. Courses have files with
//
//	/bin/bash -c "for f in src/*; do cp $f /build; done"
//
// where ours would put nothing in the place of $f.
func innerShell(s string) string {
	m := shellCall.FindStringSubmatch(s)
	if m == nil || !strings.ContainsAny(m[2], "$`") {
		return s
	}
	return m[1] + "'" + strings.ReplaceAll(quoted.Replace(m[2]), "'", `'\''`) + "'" + m[3]
}

// quoted undoes the backslashes that mean something within double quotes.
var quoted = strings.NewReplacer(`\\`, `\`, `\"`, `"`, `\$`, `$`, "\\`", "`", "\\\n", "")

// forItself matches a command that would do something to the commands after it, if they
// were run by the same shell.
var forItself = regexp.MustCompile(`^\s*(cd|export|source)\s[^;&|\n]*$`)

// machines are other names for what Go, and so raid, calls a processor.
var machines = map[string]string{"x86_64": "amd64", "x86-64": "amd64", "x64": "amd64", "aarch64": "arm64", "ppc64el": "ppc64le"}

// machine reads the name of a processor into to.
func (f *yamlFile) machine(to *string) func(ast.Node) error {
	return func(n ast.Node) error {
		err := f.text(to)(n)
		*to = strings.ToLower(*to)
		*to = cmp.Or(machines[*to], *to)
		return err
	}
}

// duration reads a time such as 10m, 1h30m or a number of seconds into to.
func (f *yamlFile) duration(to *time.Duration) func(ast.Node) error {
	return func(n ast.Node) error {
		const want = "a time such as 10m, 1h30m, or seconds"
		s, err := f.scalar(n, want)
		if err != nil {
			return err
		}
		d, err := time.ParseDuration(s)
		if seconds, ferr := strconv.ParseFloat(s, 64); ferr == nil {
			d, err = time.Duration(seconds*float64(time.Second)), nil
			if math.IsNaN(seconds) || seconds > math.MaxInt64/float64(time.Second) {
				d = -1
			}
		}
		if err != nil || d < 0 {
			return f.fail(n, "", "%s is not %s", shown(s), want)
		}
		*to = d
		return nil
	}
}

// bytes reads a size into to.
func (f *yamlFile) bytes(to *int64) func(ast.Node) error {
	return func(n ast.Node) error {
		const want = "a size such as 8GiB, 8GB, or bytes"
		s, err := f.scalar(n, want)
		if err != nil {
			return err
		}
		size, err := ParseSize(s)
		if err != nil {
			return f.fail(n, "", "%s is not %s", shown(s), want)
		}
		*to = size
		return nil
	}
}

// mebibytes reads resources.gpu.memory: RAI's bare number has no unit, MiB is meant.
func (f *yamlFile) mebibytes(to *int64, n ast.Node) error {
	s, err := f.scalar(n, "a size such as 8GiB, or MiB")
	if err != nil {
		return err
	}
	if mib, err := strconv.ParseInt(s, 10, 64); err == nil && mib >= 0 {
		*to = mib
		return nil
	}
	var size int64
	if err := f.bytes(&size)(n); err != nil {
		return err
	}
	*to = size >> 20
	return nil
}

// ParseSize reads a number of bytes: 1048576, 8GB (powers of 1000), 8GiB or 8G
// (powers of 1024), 1.5 GiB. Case does not matter. Negative sizes are errors.
func ParseSize(s string) (int64, error) {
	number := strings.TrimRight(s, "bBiIkKmMgGtT ")
	unit := strings.ToLower(strings.TrimSpace(s[len(number):]))
	factor, ok := map[string]float64{
		"": 1, "b": 1,
		"k": 1 << 10, "kib": 1 << 10, "kb": 1e3,
		"m": 1 << 20, "mib": 1 << 20, "mb": 1e6,
		"g": 1 << 30, "gib": 1 << 30, "gb": 1e9,
		"t": 1 << 40, "tib": 1 << 40, "tb": 1e12,
	}[unit]
	if exact, err := strconv.ParseInt(number, 10, 64); ok && factor == 1 && err == nil && exact >= 0 {
		return exact, nil
	}
	n, err := strconv.ParseFloat(number, 64)
	if !ok || err != nil || !(n >= 0) || n*factor >= math.MaxInt64 {
		return 0, fmt.Errorf("size %q: want a number of bytes, or a unit such as MiB, GiB or GB", s)
	}
	return int64(n * factor), nil
}
