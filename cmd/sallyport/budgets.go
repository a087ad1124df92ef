package main

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"log/slog"
	"net"
	"os"
	"path/filepath"
	"strings"
	"text/tabwriter"
	"time"

	"github.com/redis/go-redis/v9/logging"
	"github.com/spf13/cobra"
	"github.com/spf13/pflag"
	"golang.org/x/sync/errgroup"
	"google.golang.org/grpc"

	"sallyport.dev/budget"
	"sallyport.dev/budget/gate"
	"sallyport.dev/budget/local"
	"sallyport.dev/budget/shared"
	"sallyport.dev/segment"
)

// budgetFlags say where budgets are counted.
type budgetFlags struct{ redis string }

func (f *budgetFlags) add(flags *pflag.FlagSet) {
	flags.StringVar(&f.redis, "budget-redis", "", "`URL` of the Redis that counts budgets for several gateways, as in rediss://host:6379/0 (default $SALLYPORT_REDIS_URL, where a password is seen by fewer; else they are counted beside each gateway)")
}

// shared returns the counters in Redis, or nil.
func (f *budgetFlags) shared() (*shared.Counters, error) {
	url := cmp.Or(f.redis, os.Getenv("SALLYPORT_REDIS_URL"))
	if url == "" {
		return nil, nil
	}
	logging.Disable() // it would write to standard error, and every error is returned, too
	counters, err := shared.Open(url)
	if err != nil {
		return nil, usage("a URL is redis://USER:PASSWORD@HOST:PORT/DATABASE, or rediss:// with TLS", "--budget-redis: %w", err)
	}
	return counters, nil
}

// budgetFile is what a gateway counts in, in its state folder.
const budgetFile = "budgets"

// budgets answer one gateway.
type budgets struct {
	gate   *gate.Gate
	socket net.Listener
	run    func(context.Context) error // keeps the counters until the context ends
}

func (f *budgetFlags) open(state *stateFolder, log *slog.Logger) (*budgets, error) {
	socket, err := state.listen("budget.sock")
	if err != nil {
		return nil, err
	}
	b := &budgets{socket: socket}
	together, err := f.shared()
	if err != nil {
		return nil, err
	}
	if together != nil {
		b.gate = gate.New(together, log)
		b.run = func(ctx context.Context) error {
			<-ctx.Done()
			return together.Close()
		}
		return b, nil
	}
	own, err := local.Open(filepath.Join(state.dir, budgetFile), time.Now(), log)
	if err != nil {
		return nil, failed("free the disk, or move the file away: then all begin anew", "%w", err)
	}
	b.gate, b.run = gate.New(own, log), own.Run
	return b, nil
}

// serve answers until the context ends. The counters end after the last settlement.
func (b *budgets) serve(ctx context.Context, group *errgroup.Group) {
	server := grpc.NewServer(grpc.WaitForHandlers(true))
	b.gate.Register(server)
	counting, stop := context.WithCancel(context.WithoutCancel(ctx))
	group.Go(func() error { return b.run(counting) })
	group.Go(func() error {
		defer stop()
		if err := server.Serve(b.socket); err != nil && ctx.Err() == nil {
			return fmt.Errorf("serve %s: %w", b.socket.Addr(), err)
		}
		return nil
	})
	group.Go(func() error {
		<-ctx.Done()
		server.Stop()
		return nil
	})
}

// standing is how an account stands, as `budgets` shows it.
type standing struct {
	budget.Balance
	Remaining int64 `json:"remaining"`
}

func budgetsCommand() *cobra.Command {
	var f budgetFlags
	var o output
	var state, grant, caller string
	cmd := &cobra.Command{
		Use:   "budgets",
		Short: "Show what is used of budgets, and what is left",
		Long: `Budgets shows how far the callers of grants with a budget have used it up, in the windows that are not over. It reads
the file that a gateway (or ` + "`up`" + `) keeps in its state folder, or asks the Redis that several gateways share: the
program itself need not be running. What is held is what requests under way have taken in advance; a file does not tell.`,
		Example: `  sallyport budgets --grant rag-asks
  sallyport budgets --state /var/lib/sallyport/gateway -o json
  SALLYPORT_REDIS_URL=rediss://user:password@redis.internal:6379/0 sallyport budgets`,
		Args: noArgs,
		RunE: func(cmd *cobra.Command, _ []string) error {
			all, err := f.balances(cmd, state)
			if err != nil {
				return err
			}
			shown := []standing{}
			for _, b := range all {
				if (grant == "" || b.Grant == segment.GrantName(grant)) && (caller == "" || segment.Pattern(caller).Matches(b.Caller)) {
					shown = append(shown, standing{b, b.Remaining()})
				}
			}
			return o.print(cmd.OutOrStdout(), shown, func() error { return writeBudgets(cmd.OutOrStdout(), shown) })
		},
	}
	stateFlag(cmd.Flags(), &state)
	f.add(cmd.Flags())
	cmd.Flags().StringVar(&grant, "grant", "", "`NAME` of a grant")
	cmd.Flags().StringVar(&caller, "caller", "", "SPIFFE `ID`, or its beginning and a *")
	o.add(cmd, "text", "json")
	return cmd
}

func (f *budgetFlags) balances(cmd *cobra.Command, state string) ([]budget.Balance, error) {
	together, err := f.shared()
	if err != nil {
		return nil, err
	}
	if together != nil && !cmd.Flags().Changed("state") {
		defer together.Close()
		all, err := together.Balances(cmd.Context(), time.Now())
		if err != nil {
			return nil, failed("is this the Redis that the gateways have?", "%w", err)
		}
		return all, nil
	}
	all, err := local.ReadFile(filepath.Join(state, budgetFile), time.Now())
	if errors.Is(err, fs.ErrNotExist) {
		return nil, failed("name the state folder of a gateway with --state, or its Redis with --budget-redis", "no gateway has counted in %s", state)
	} else if err != nil {
		return nil, failed("name the state folder of a gateway with --state", "%w", err)
	}
	return all, nil
}

func writeBudgets(w io.Writer, all []standing) error {
	if len(all) == 0 {
		_, err := fmt.Fprintln(w, "nothing has been counted yet")
		return err
	}
	t := tabwriter.NewWriter(w, 0, 0, 2, ' ', 0)
	fmt.Fprintln(t, "GRANT\tCALLER\tWHAT\tUSED\tHELD\tLEFT\tOF\tRESETS")
	for _, b := range all {
		fmt.Fprintf(t, "%s\t%s\t%s\t%d\t%d\t%d\t%d a %s\t%s\n", plain(string(b.Grant)), plain(cmp.Or(b.Caller, "all together")), plain(string(b.Unit)),
			b.Used, b.Held, b.Remaining, b.Max, plain(strings.ToLower(string(b.Per))), b.Resets.UTC().Format(time.RFC3339))
	}
	return t.Flush()
}
